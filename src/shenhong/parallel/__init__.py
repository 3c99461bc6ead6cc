"""Taking part in a run with other processes."""

from shenhong.parallel.mesh import Mesh, join, leave

__all__ = ["Mesh", "join", "leave"]
