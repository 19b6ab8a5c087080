"""Who gets the next token, and when: scheduler, engine, executors, the front."""
