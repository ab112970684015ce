"""How many replicas a load needs.

observed    what is seen of the replicas at one moment
forecast    rows a second to be ready for, one cold start from now
starts      how long a cold start takes, learned
policy      the decision: pure, state in and state out
kinds       the decision for two kinds of replica, by their prices
report      how a replica tells its load to Ray Serve, and how that is read
on_serve    what Ray Serve's controller calls; kinds_on_serve and kinds_table for two kinds
"""
