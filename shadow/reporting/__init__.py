"""How is a store told to a reader? The report, as page, terminal summary and JSON."""
