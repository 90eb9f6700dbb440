startPicture();
startGallery();
startClasses();
startConcepts();
