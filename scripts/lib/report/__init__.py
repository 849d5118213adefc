"""Parts of scripts/report.py: reading run folders, drawing, the page."""
