"""The `gptloom` command: its words (arguments), how it begins and ends (cli), a file a subject, what a verb finds around it
(surroundings)."""
