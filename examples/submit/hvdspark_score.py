"""What `hvdspark score` does, as the program of spark-submit. Nothing in it needs to be changed.

spark-submit --master spark://host:7077 --py-files hvdspark.zip \
    examples/submit/hvdspark_score.py --model alias:champion --store /shared/experiments \
    --input /data/today --output /data/today-scored
"""

from hvdspark.cli.score import score

if __name__ == "__main__":
    score()
