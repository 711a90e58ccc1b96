"""From records to tables, plots and a page: pure functions of what was measured."""
