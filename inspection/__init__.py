"""Looking at models, data and runs: what audit, xray and lens find, and the one page style of their reports."""
