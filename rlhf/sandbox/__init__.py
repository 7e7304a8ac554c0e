"""Sandbox for generated programs: no network, no writable files, limits on time and memory."""
