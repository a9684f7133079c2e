"""Who answers the lines of a batch: a cluster of the job's own, or an endpoint."""
