"""Histograms, tables, graphs."""
