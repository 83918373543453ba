"""Meshes of devices, and which array axis goes to which mesh axis."""
