"""Named problems with known answers, and assertions: for tests and benchmarks. The package itself never imports this."""
