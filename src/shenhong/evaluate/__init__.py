"""Measures of a finished model and the report of its run.

evaluate.evaluate(…)        all measures, as JSON-able values
report.write_report(run)    report.html and report.md from the files of a run
settings.EvaluateSettings   the recipe's [evaluate] table
metrics, ngram, copying     what holds for every kind of text; a domain adds its own
"""
