"""Devices and processes: how JAX is started, the mesh, what is split over it, sampling from parts of a vocabulary."""
