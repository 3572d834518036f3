from valor.startup import spare_the_collector

spare_the_collector()
