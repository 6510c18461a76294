"""The report: one HTML file about a store that opens offline in any browser."""
