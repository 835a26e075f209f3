"""The `gptloom` command: its words (arguments), its verbs (cli), and what a verb finds around it (surroundings)."""
