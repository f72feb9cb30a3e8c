"""What pyproject.toml cannot say: the cffi modules, two small native programs, and the protobuf modules."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# Program -> its sources. Each is linked statically, so that it starts in a foreign mount namespace too.
PROGRAMS = {
    "lazymig/skeleton/keeper": ["lazymig/skeleton/native/keeper.c"],
    "lazymig/track/holder": ["lazymig/track/native/holder.c"],
    "lazymig/dropin/keeper": ["lazymig/dropin/native/keeper.c"],
    "lazymig/demo/writer": [
        f"lazymig/demo/native/{name}.c" for name in ("writer", "arena", "threads", "memory", "state")
    ],
}


class BuildProtos(Command):
    """Generates lazymig/pb/*_pb2.py and their type stubs from protos/."""

    description = "generate protobuf modules"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        from grpc_tools import protoc

        files = sorted(str(p) for p in (HERE / "protos").rglob("*.proto"))
        args = ["protoc", f"-I{HERE / 'protos'}", f"--python_out={HERE}", f"--pyi_out={HERE}", *files]
        if files and protoc.main(args) != 0:
            sys.exit("protoc failed")


class Build(build_py):
    """build_py, after the protobuf modules were made."""

    def run(self) -> None:
        self.run_command("build_protos")
        super().run()


class BuildExt(build_ext):
    """build_ext, and the native programs beside the modules."""

    def run(self) -> None:
        self.run_command("build_protos")
        super().run()
        self.build_programs()

    def build_programs(self) -> None:
        if not hasattr(self.compiler, "link_executable"):
            from setuptools._distutils.ccompiler import new_compiler
            from setuptools._distutils.sysconfig import customize_compiler

            self.compiler = new_compiler()
            customize_compiler(self.compiler)
        for target, sources in PROGRAMS.items():
            if not all((HERE / s).exists() for s in sources):
                continue
            flags = ["-O2", "-g0", "-Wall", "-Wextra", "-Werror", "-std=gnu11"]
            objects = self.compiler.compile(sources, output_dir=self.build_temp, extra_postargs=flags)
            out = HERE / target if self.inplace else Path(self.build_lib) / target
            out.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_executable(objects, str(out), extra_postargs=["-static", "-pthread", "-s"])


setup(
    cffi_modules=["lazymig/native_build.py:ffi"],
    cmdclass={"build_protos": BuildProtos, "build_py": Build, "build_ext": BuildExt},
)
