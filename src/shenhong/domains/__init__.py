"""One room a kind of text: what is read, how it is asked for, measured, rewarded, reported and shown.

`names` and `domain` find those that are here, `of_run` that of a finished run, and `kind_of` its name; a person's own file is `registry`'s matter.
"""

from shenhong.domains.registry import domain, kind_of, names, of_run

__all__ = ["domain", "kind_of", "names", "of_run"]
