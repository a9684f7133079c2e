"""Where the job's files are: on this machine, or in a store that fsspec knows. Imports fsspec."""

import io
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from deploy.config.load import ConfigError

CLOUD = ("s3", "s3a", "gs", "gcs")
JOB_FOLDER = "working_dir_files"
"""Ray unpacks the working directory of a job below a folder of this name."""


@dataclass(frozen=True, slots=True)
class Location:
    """One file or object. url: as given. path: as `fs` wants it; absolute, where it is local."""

    url: str
    fs: Any
    path: str

    @classmethod
    def parse(cls, url: str) -> "Location":
        """Errors: ConfigError."""
        scheme = url.partition("://")[0]
        try:
            fs, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = ": pip install 'manta-serve[cloud]'" if scheme in CLOUD else ""
            raise ConfigError(f"{scheme}:// needs a package that is not installed ({error}){extra}") from error
        except ValueError as error:
            raise ConfigError(f"{url}: {error}") from error
        return cls(url, fs, path)

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def in_job_folder(self) -> bool:
        """It goes when Ray clears the folder into which it unpacked this job."""
        return self.local and JOB_FOLDER in self.path.split("/")

    def __str__(self) -> str:
        return self.path if self.local else self.url

    def size_bytes(self) -> int:
        """Errors: ConfigError if it cannot be read: the first touch shows wrong names and missing credentials."""
        try:
            return int(self.fs.info(self.path)["size"])
        except FileNotFoundError as error:
            raise ConfigError(f"{self} does not exist") from error
        except Exception as error:  # each store has errors of its own
            raise ConfigError(f"cannot read {self}: {error}") from error

    def open(self) -> BinaryIO:
        """To be read from its beginning, buffered."""
        if self.local:
            return open(self.path, "rb")
        return cast(BinaryIO, io.BufferedReader(self.fs.open(self.path, "rb")))
