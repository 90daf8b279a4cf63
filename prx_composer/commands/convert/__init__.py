"""`prx data convert`: from what people have (tars, parquet, JSON lines, MDS) to the bucketed shards that `data.schema` defines.

In reading order: `settings.py` what was asked for, `input_kinds.py` the input in work units of raw records, `sample.py` one
record, `writer.py` one unit, `job.py` all of them, `convert_report.py` what came of it.
"""
