"""Runs with faults (killed, frozen, out of memory or disk, damaged files), in processes of their own."""
