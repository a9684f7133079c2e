"""The gRPC contract, `manta.proto`. `manta_pb2.py`, its types and `manta_pb2_grpc.py` are generated beside it by `setup.py`:
when the package is installed (`make install`, also after an edit) and into every wheel. They are never edited or committed.
"""
