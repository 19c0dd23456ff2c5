"""Measurements of speed and memory. Results lie in results/ as JSON with the machine and the versions."""
