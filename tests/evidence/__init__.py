"""What docs/real-model.md reports, each part a script: `python -m tests.evidence.agreement` and its siblings."""
