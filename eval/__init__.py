"""Programs that sample and score; run from the checkout, never installed."""
