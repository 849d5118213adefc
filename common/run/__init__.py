"""The record of a run: its files, logs, figures and errors."""
