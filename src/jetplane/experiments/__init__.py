"""Training runs on real data: what the command line is made of. Needs the extra ``jetplane[cli]``."""
