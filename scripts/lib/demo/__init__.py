"""Parts of scripts/demo.py: materials, measurements, report."""
