"""Runs that are killed, frozen, starved or lied to, in processes of their own."""
