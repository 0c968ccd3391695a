"""A ClientApp that does nothing: it sends back the model it was sent.

Actors import it by name, from ``PYTHONPATH`` (:mod:`bench_overhead`).
"""

from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from fedge_sim import records
from fedge_sim.client_app import clients_served

METRICS = MetricRecord({records.NUM_EXAMPLES: 1, records.LOSS: 0.0, records.SECONDS: 0.0})

app = ClientApp()
app.query()(clients_served)


@app.train()
def train(message: Message, _: Context) -> Message:
    """Answer with the received model."""
    return records.reply(message, arrays=records.arrays_of(message), metrics=METRICS)
