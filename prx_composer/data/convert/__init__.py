"""`prx data convert`: from what people have (tars, parquet, JSON lines, MDS) to the bucketed shards that `schema.py` defines.

In reading order: `settings.py` what was asked for, `sources.py` the input in work units of raw records, `sample.py` one record,
`writer.py` one unit, `job.py` all of them, `report.py` what came of it.
"""
