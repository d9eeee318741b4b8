"""What `hvdspark train` does, as the program of spark-submit. Nothing in it needs to be changed.

spark-submit --master spark://host:7077 --py-files hvdspark.zip \
    examples/submit/hvdspark_job.py --config examples/submit/job.yaml --set batch_size=512
"""

from hvdspark.cli.train import train

if __name__ == "__main__":
    train()
