"""The wheel carries what the repository keeps beside the package: recipes, and the small corpora they train on."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KEPT = (
    *("recipes/*.toml", "data/*/README.md", "data/smollm2/fetch.py"),
    *(
        "data/poetry/poems.parquet",
        "data/english/factbook.parquet",
        "data/assistant/facts.jsonl.gz",
    ),  # nobody's own corpora beside them
)


class WithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them already
            return
        for path in (path for pattern in KEPT for path in ROOT.glob(pattern)):
            copy = Path(self.build_lib, "shenhong", "bundled", path.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": WithRecipes})
