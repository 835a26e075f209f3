"""The servers of `gptloom up` on this machine: started, watched, stopped as one; their databases, pools and ports."""
