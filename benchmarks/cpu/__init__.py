"""Where does the time of a step go on a CPU, and what do its ops reach of what the machine can do?"""
