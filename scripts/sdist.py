"""Puts into the sdist what the suite needs, so that it runs from there.

In place of a MANIFEST.in, which setuptools reads from the top level alone.
"""

from setuptools.command.sdist import sdist


class CompleteSdist(sdist):
    def make_distribution(self) -> None:
        self.filelist.include("Makefile")
        for folder in ("tests", "scripts", ".github"):
            self.filelist.graft(folder)
        self.filelist.prune(".github/screenshots")
        for name in ("list", "secret"):  # those that the README shows
            self.filelist.include(f".github/screenshots/{name}.png")
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()
