"""The actors of a gang: one model copy on N devices.

gang.py           Gang, the Serve deployment: takes what Serve configures, and requests
setup.py          what a gang knows of its model once Serve has configured it
supervisor.py     starts a gang's ranks, gives turns on them, replaces lost ones
gang_report.py    what a gang says of itself: to the autoscaler, to the routers and to people
turn.py           who has the ranks: one alone, or several requests of an elastic gang
elastic.py        the requests of an elastic gang, side by side: asks the dealer at every boundary
journey.py        one of them: what is kept of it outside its ranks
dealer.py         which ranks each of them has for its next step; a pure function
forecast.py       when they will be done, by the dealer
step_costs.py     what a step takes at each degree, learned from those before
rank_group.py     the ranks of a gang: hands each request to all of them
elastic_rank_group.py  those of an elastic gang: hands parts of requests to some of them
losses.py         which ranks live, and which end with one that is lost
rank_run.py       one request on some ranks: what they report, in one queue
spare_ranks.py    processes that take the places of lost ones
rank_processes.py their processes: made in the placement group, brought together, killed
answers.py        requests that have left the ranks, whose pictures are still encoded
watch.py          looks at the processes and the progress of ranks, and says when one is lost
gang_guard.py     a small process of each gang, which ends the gang's own if that is stopped
process_state.py  what /proc says of a rank's process
rank_actor.py     Rank as a Ray actor
rank_process.py   prepares the process of a rank, before its libraries load
rank.py           Rank, one process on one device: joins the group, loads the model, generates
elastic_rank.py   ElasticRank, whose requests come in parts, on changing blocks of ranks
profiling.py      what the steps of a request consist of, by torch's profiler
rank_telemetry.py what a rank tells of its work: its status, its metrics, the marks of a traced request
memory_use.py     how much memory a rank uses
rank_trace.py     these marks of stages and steps
rank_spans.py     the spans that the gang makes of it
device.py         which device a rank uses
network.py        over which network interface ranks talk
rendezvous.py     how ranks find one another
boundary.py       where all ranks agree whether a request goes on
encoding.py       the pictures that rank 0 has decoded, until they are files
preview_files.py  previews of rank 0, encoded in a thread while it computes
local.py          a gang without Ray, for `spray generate --local`
self_test.py      compares, before a gang serves, what it computes with what one rank computes
warm_up.py        what a rank runs at its start
placement.py      ModelSpec -> Serve options: the bundles of a gang, and why they cannot be scheduled
adapter_sync.py   brings the adapters of running ranks to those of the deployment file
caller.py         sees that the gateway which sent a request has died
cost.py           seconds that a request costs, learned from those before
stats.py          the forms in which it reports its load
ray_internals.py  what Ray has no public name for
"""
