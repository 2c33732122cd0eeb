"""Studies, which compare ensembles: a grid of trainings, paired statistics and a report."""
