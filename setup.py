"""What pyproject.toml cannot say: the folder ``configs`` is installed as ``qaroma/configs``."""

from pathlib import Path

from setuptools import find_packages, setup

folders = [path for path in (Path("configs"), *sorted(Path("configs").rglob("*"))) if path.is_dir()]
configs = {".".join(("qaroma", *path.parts)): path.as_posix() for path in folders}
setup(
    packages=[*find_packages(include=["qaroma*"]), *configs],
    package_dir=configs,
    package_data={"": ["*.yaml", "constraints.txt"], "qaroma.report": ["templates/*"]},
)
