"""v2 against v3: decode, fold, pair, account, store, report. No Redis, no torch."""
