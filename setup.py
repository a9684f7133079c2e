"""The one step of the build that `pyproject.toml` cannot say: stubs from `deploy/proto/manta.proto`, by the pinned tool.

An editable install gets them beside the contract, a wheel inside itself; the source folder of a wheel stays as it is.
"""

from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

CONTRACT = "deploy/proto/manta.proto"
STUBS = ("deploy/proto/manta_pb2.py", "deploy/proto/manta_pb2.pyi", "deploy/proto/manta_pb2_grpc.py")


class BuildStubs(Command):
    """A step of `build`, see `setuptools.command.build.SubCommand`."""

    description = "generate the gRPC stubs"
    user_options = []  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib = None  # None is how setuptools writes "not said"
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        from grpc_tools import protoc

        folder = "." if self.editable_mode else str(self.build_lib)
        Path(folder).mkdir(parents=True, exist_ok=True)
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", "-I.", *outputs, CONTRACT]) != 0:
            raise SystemExit(f"{CONTRACT} could not be compiled")

    def get_source_files(self) -> list[str]:
        return [CONTRACT]

    def get_outputs(self) -> list[str]:
        return [f"{self.build_lib}/{stub}" for stub in STUBS]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_stubs", None)]  # noqa: RUF012


setup(cmdclass={"build": Build, "build_stubs": BuildStubs})
