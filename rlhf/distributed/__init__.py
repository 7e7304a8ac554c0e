"""Several ranks: sums over them, a watchdog for late or dead ones, and weights sharded over them."""
