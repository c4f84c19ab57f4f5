"""The command line: `config` and `build` read it, `plan` resolves it, `fit` and `predict` carry it out, `compare` reads
what came of it."""
