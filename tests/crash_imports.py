"""What the processes that `tests.crash` starts have in common, loaded once."""

import datasets  # noqa: F401
import sklearn.metrics  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.bert.modeling_bert
import transformers.trainer  # noqa: F401

import rosa.bench.exporting
import rosa.bench.report.tables
import rosa.bench.train.surviving
import rosa.bench.train.training
import rosa.cli.commands  # noqa: F401
