"""Measures of a finished model and the report of its run.

evaluate.evaluate(…)        all measures, as JSON-able values
report.write_report(run)    report.html and report.md from the files of a run
settings.EvaluateSettings   the recipe's [evaluate] table
metrics, ngram, copying     for every kind of text;  verse, report_verse  for verse alone
"""
