"""Questions with known answers, asked by several methods, scored and compared.

`datasets` reads them, `run` asks and records, `scores` and `bootstrap` judge, `report` shows.
"""
