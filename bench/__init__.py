"""Layer 4: numbers. Speed, memory and fidelity of artifacts, side by side, with a report to look at."""
