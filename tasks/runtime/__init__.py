"""How a step becomes a process: started, watched, heard, ended."""
