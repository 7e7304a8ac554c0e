"""Generated programs run in an enclosure: no network, no writable files, bounded time and memory."""
