"""The wheel carries what the repository keeps beside the package: recipes, and the small corpora they train on."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KEPT = ("*.toml", "*.parquet", "README.md", "fetch.py")


class WithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them already
            return
        for folder in ("recipes", "data"):
            for path in (p for kind in KEPT for p in (ROOT / folder).rglob(kind)):
                copy = Path(self.build_lib, "shenhong", "bundled", path.relative_to(ROOT))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": WithRecipes})
