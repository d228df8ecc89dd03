"""What the questions share: the machine's facts, one timer, results, tables, pictures, servers and worker processes."""
