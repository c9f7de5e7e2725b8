"""Devices: the mesh and the sharding rules."""
